"""Fuzz targets: whatever bytes stand in a file, a reader answers or says one sentence, soon and in little memory."""
