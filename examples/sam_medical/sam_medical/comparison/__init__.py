"""Many runs of several methods under one set of conditions, and one report about them."""
