"""How good an adapter is while it is trained and when it is done, for every family and method alike.

split       which pictures are kept from training                     points    fixed questions that are asked again
judge       asks them in the middle of a run, keeps weights, stops it  history   what was answered, and what follows
bootstrap   intervals of paired differences                            pictures  copies, sameness and blank pictures
grid        the same seeds at several strengths                        summary   evaluation.json, and its plain words
"""
