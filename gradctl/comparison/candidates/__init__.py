"""Another implementation as the candidate of a comparison."""
