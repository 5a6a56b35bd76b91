"""The content filters that the licence of FLUX.1 Krea [dev] asks for: networks, and the policy that uses them."""
