"""What people look at: tables and text in the terminal, and plots."""
