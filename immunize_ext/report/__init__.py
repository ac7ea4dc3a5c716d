"""Pages, tables and plots; knows no model and measures nothing."""
