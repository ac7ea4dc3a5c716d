"""The pipeline of digits that comes with the package: weights, images, concepts, judge."""
