"""What a policy keeps of an image and of an answer: as arrays (`explain`), as a picture, as a page."""
