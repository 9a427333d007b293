"""Ready-made uses of the toolkit, and the small rendered world they are checked in."""
