"""Where tokens come from: one file an issuer, all of them behind `base.Issuer`."""
