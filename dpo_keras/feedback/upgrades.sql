-- What version 2 adds to a store of version 1.
ALTER TABLE annotators ADD COLUMN judge INTEGER NOT NULL DEFAULT 0;
ALTER TABLE judgements ADD COLUMN preference REAL;
CREATE TABLE answers (hash TEXT PRIMARY KEY, content TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
