"""What the images stage reads from a user's folders."""
