"""What several drafters are made of. A file here is not a drafter."""
