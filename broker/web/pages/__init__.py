"""Pages, scripts and the API document that the data listener serves."""
