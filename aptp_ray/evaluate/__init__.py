"""What came out: measures of routing, images of teacher and experts side by side, and the page that shows both."""
