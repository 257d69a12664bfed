"""How well a merged model paints as its teachers do."""
