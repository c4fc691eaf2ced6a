"""What every room may use: paths and data from anywhere, and how names and tables are printed."""
