"""Programs that build and check the project; the product imports none of them."""
