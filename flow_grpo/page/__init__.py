"""The page: what an evaluation found, as one offline HTML."""
