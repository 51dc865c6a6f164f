"""Look at rows as the models read them and at what a trained loss computed on them: `dwakd inspect`.

`dwakd.inspection.inspect.sections` returns the sections of an HTML page, which `dwakd report` also shows.
"""
