"""What a run leaves: results.json, tables, plots, Markdown and HTML."""
