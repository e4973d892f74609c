"""Tasks: one module per kind; importing this package imports none of the heavy libraries behind them."""
