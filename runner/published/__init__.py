"""Published recipes: downloaded at a commit and confirmed by the user before they run."""
