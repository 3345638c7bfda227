"""Export labels to review tools, with the teachers' labels, and read back corrections."""
