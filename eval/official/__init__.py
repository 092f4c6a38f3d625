"""Files and folder layouts of the official code, read and written."""
