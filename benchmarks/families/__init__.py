"""Public families of networks in a tiny form: which of them can be fused, pair by pair."""
