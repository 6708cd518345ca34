"""What people read: tables of text, curves."""
