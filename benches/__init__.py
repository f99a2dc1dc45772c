"""What a user compares with, measured side by side: `python -m benches --help`."""
