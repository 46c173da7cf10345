"""`elbo score NAME INPUT OUTPUT`: score datasets that are larger than memory, in parts, on one machine or on Ray."""
