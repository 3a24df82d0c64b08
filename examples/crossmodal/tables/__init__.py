"""What a job leaves for its reader: tables, figures, the published numbers beside ours."""
