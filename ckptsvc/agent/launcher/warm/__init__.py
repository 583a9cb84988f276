"""The only module of this directory is `sitecustomize`: with the directory in PYTHONPATH, a new interpreter runs it."""
