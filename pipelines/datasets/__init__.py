"""Published and own data sets: one reader for each form of annotation, and one way from there to scanned manifests."""
