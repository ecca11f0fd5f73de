"""Watch one run of the user's program: cuts, custom Functions, values, promotion, non-finite values."""
