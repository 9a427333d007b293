"""Shows run folders in the browser. Holds no model; reads, never writes."""
