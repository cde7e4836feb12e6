"""What is kept of a data set from batch to batch: a slot for each view of each item, here or over ranks."""
