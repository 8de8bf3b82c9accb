"""Bad input of every entry point: what each must refuse in one line, before anything is written."""
