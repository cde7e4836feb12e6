"""Two modalities with a tower for each, and batches that are chosen over the whole data set (GCBS).

`halves.py`: left halves of digits find their right halves, by every loss that has a setting for it. `gcbs.py`: chosen
batches beside random ones. `finetune_verses.py`: a sentence encoder on verses in two translations.
"""
