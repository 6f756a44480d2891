"""What requests share: buckets, tokens, refusals.  One file a store, all behind `base.Store`."""
