"""Files and images in and out, the errors that a user can cause, what C libraries print."""
