-- One file holds a whole round of feedback. user_version counts changes of this schema.
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE prompts (
  id INTEGER PRIMARY KEY,
  hash TEXT NOT NULL UNIQUE,
  content TEXT NOT NULL,           -- JSON: text, or a list of role/content messages
  name TEXT,                       -- the id that the candidates file gave
  grp TEXT
);
CREATE TABLE responses (
  id INTEGER PRIMARY KEY,
  prompt INTEGER NOT NULL REFERENCES prompts,
  hash TEXT NOT NULL,
  content TEXT NOT NULL,
  maker TEXT,                      -- label of the policy and setting, never shown to annotators
  setting TEXT,                    -- JSON: all that is known of how it was made
  UNIQUE (prompt, hash)
);
CREATE TABLE pairs (
  id INTEGER PRIMARY KEY,
  prompt INTEGER NOT NULL REFERENCES prompts,
  first INTEGER NOT NULL REFERENCES responses,
  second INTEGER NOT NULL REFERENCES responses,
  gold INTEGER REFERENCES responses, -- the better one, where it is known and asked as a check
  taken INTEGER NOT NULL DEFAULT 0,  -- places in use: people's leases and judgements, not skips
  shuffle REAL NOT NULL,             -- random order of presentation
  UNIQUE (first, second),
  CHECK (first <> second)
);
CREATE INDEX pairs_open ON pairs (taken DESC, shuffle) WHERE gold IS NULL;
CREATE INDEX pairs_gold ON pairs (shuffle) WHERE gold IS NOT NULL;

CREATE TABLE annotators (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  grp TEXT,
  admin INTEGER NOT NULL DEFAULT 0,
  token_hash TEXT NOT NULL UNIQUE,
  expires REAL NOT NULL,
  judge INTEGER NOT NULL DEFAULT 0     -- 1: a program; it takes no place of a person, nor signs in
);
CREATE TABLE sessions (
  hash TEXT PRIMARY KEY,
  annotator INTEGER NOT NULL REFERENCES annotators,
  expires REAL NOT NULL
) WITHOUT ROWID;

CREATE TABLE presentations (
  id INTEGER PRIMARY KEY,
  pair INTEGER NOT NULL REFERENCES pairs,
  annotator INTEGER NOT NULL REFERENCES annotators,
  repeat INTEGER NOT NULL DEFAULT 0,   -- 1: the pair shown again, to see whether the answer holds
  first_on_left INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('leased', 'judged', 'skipped', 'released')),
  shown REAL NOT NULL,
  expires REAL NOT NULL,
  entry INTEGER,                       -- the last of its entries in the log
  UNIQUE (pair, annotator, repeat)
);
CREATE INDEX presentations_leased ON presentations (expires) WHERE state = 'leased';
CREATE INDEX presentations_own ON presentations (annotator, state, id);
CREATE INDEX presentations_entry ON presentations (annotator, entry);
CREATE INDEX presentations_state ON presentations (state, repeat);

CREATE TABLE judgements (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  presentation INTEGER NOT NULL REFERENCES presentations,
  verdict TEXT NOT NULL CHECK (verdict IN ('prefer', 'tie', 'both_bad', 'skip', 'undo')),
  winner INTEGER REFERENCES responses, -- a response, never a side
  strength INTEGER,
  reason TEXT,
  seconds REAL,
  at REAL NOT NULL,
  key TEXT NOT NULL UNIQUE,            -- the browser's: the same one twice is one judgement
  preference REAL,                     -- a judge's P(the winner is better); people give none
  CHECK ((verdict = 'prefer') = (winner IS NOT NULL))
);
CREATE INDEX judgements_presentation ON judgements (presentation, id);
CREATE TRIGGER judgements_stay BEFORE UPDATE ON judgements
BEGIN SELECT RAISE(ABORT, 'judgements are never changed'); END;
CREATE TRIGGER judgements_remain BEFORE DELETE ON judgements
BEGIN SELECT RAISE(ABORT, 'judgements are never deleted'); END;

-- What judges paid for, by a hash of the question: nothing is asked twice.
CREATE TABLE answers (hash TEXT PRIMARY KEY, content TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;

-- The judgements that hold: the last entry of each presentation, unless it is an undo.
CREATE VIEW current AS
SELECT j.* FROM judgements j
WHERE j.id = (SELECT max(l.id) FROM judgements l WHERE l.presentation = j.presentation)
  AND j.verdict <> 'undo';
