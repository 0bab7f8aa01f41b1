"""What happens to induction when the heads that do it are patched."""
