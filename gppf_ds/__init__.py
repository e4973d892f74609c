"""Training one vision backbone on many data sets and many kinds of task at once."""

__version__ = "0.1.0"
