"""Files of torch.save: a restricted reader of pickles, and a writer."""
