"""New forms of a prepared data set: shards, transcoded clips, staged copies; and their verification."""
