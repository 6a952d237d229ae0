"""One file per kind of stage; adding a file adds a kind."""
