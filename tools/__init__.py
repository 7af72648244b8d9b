"""Programs that build and check the project; the training code imports none of them."""
