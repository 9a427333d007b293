"""dashboards reads run folders and draws them; it holds no model. So far: figures, pure functions from arrays to
plotly charts.
"""
