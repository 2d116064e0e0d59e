-- iterdump() of a store made by commit 2861900, see test_feedback_store.py.
BEGIN TRANSACTION;
CREATE TABLE annotators (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  grp TEXT,
  admin INTEGER NOT NULL DEFAULT 0,
  token_hash TEXT NOT NULL UNIQUE,
  expires REAL NOT NULL
);
INSERT INTO "annotators" VALUES(1,'ann','experts',0,'fff3d7544084b2597e8ff1a7256e5a434db83d0fead37629bc8a719b276a58c0',3592000.0);
INSERT INTO "annotators" VALUES(2,'bob',NULL,0,'842239d2632e4ae492bdfe433beb71c4124517711669dad48d0727970fd20fd9',3592000.0);
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
  CHECK ((verdict = 'prefer') = (winner IS NOT NULL))
);
INSERT INTO "judgements" VALUES(1,1,'prefer',3,2,'r',1.5,1000000.0,'1-0');
INSERT INTO "judgements" VALUES(2,2,'prefer',1,2,'r',1.5,1000000.0,'1-1');
INSERT INTO "judgements" VALUES(3,3,'prefer',3,2,'r',1.5,1000000.0,'2-0');
INSERT INTO "judgements" VALUES(4,4,'prefer',1,2,'r',1.5,1000000.0,'2-1');
INSERT INTO "judgements" VALUES(5,4,'undo',NULL,NULL,NULL,NULL,1000000.0,'u');
INSERT INTO "judgements" VALUES(6,4,'tie',NULL,NULL,NULL,NULL,1000000.0,'t');
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "meta" VALUES('id','ef0ea6027d1c');
INSERT INTO "meta" VALUES('settings','{"overlap": 2, "lease_seconds": 1800.0, "gold_share": 0.0, "repeat_share": 0.0, "repeat_distance": 10}');
CREATE TABLE pairs (
  id INTEGER PRIMARY KEY,
  prompt INTEGER NOT NULL REFERENCES prompts,
  first INTEGER NOT NULL REFERENCES responses,
  second INTEGER NOT NULL REFERENCES responses,
  gold INTEGER REFERENCES responses, -- the better one, where it is known and asked as a check
  taken INTEGER NOT NULL DEFAULT 0,  -- places in use: leases and judgements, skips left out
  shuffle REAL NOT NULL,             -- random order of presentation
  UNIQUE (first, second),
  CHECK (first <> second)
);
INSERT INTO "pairs" VALUES(1,1,1,2,NULL,2,8.44421851525048117181e-01);
INSERT INTO "pairs" VALUES(2,2,3,4,NULL,2,7.57954402940302474078e-01);
INSERT INTO "pairs" VALUES(3,3,5,6,5,0,0.420571580830845);
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
INSERT INTO "presentations" VALUES(1,2,1,0,1,'judged',1000000.0,1001800.0,1);
INSERT INTO "presentations" VALUES(2,1,1,0,1,'judged',1000000.0,1001800.0,2);
INSERT INTO "presentations" VALUES(3,2,2,0,0,'judged',1000000.0,1001800.0,3);
INSERT INTO "presentations" VALUES(4,1,2,0,1,'judged',1000000.0,1001800.0,6);
CREATE TABLE prompts (
  id INTEGER PRIMARY KEY,
  hash TEXT NOT NULL UNIQUE,
  content TEXT NOT NULL,           -- JSON: text, or a list of role/content messages
  name TEXT,                       -- the id that the candidates file gave
  grp TEXT
);
INSERT INTO "prompts" VALUES(1,'9a6f5d96a8c38484f79ba0940f62e652b0752c8d056918b723f9637cb3aedb13','"One?"','q1','law');
INSERT INTO "prompts" VALUES(2,'96d2049353a9bafb8643acbf602a5250f323abe338ba4443eb8ddebba0c4d1ae','[{"content": "s", "role": "system"}, {"content": "Two?", "role": "user"}]',NULL,NULL);
INSERT INTO "prompts" VALUES(3,'26a3056b1a7bcb6cfd09a407d97d1aa2ae00bbb822e1a5624b65b0ea87ae28e4','"Check?"',NULL,NULL);
CREATE TABLE responses (
  id INTEGER PRIMARY KEY,
  prompt INTEGER NOT NULL REFERENCES prompts,
  hash TEXT NOT NULL,
  content TEXT NOT NULL,
  maker TEXT,                      -- label of the policy and setting, never shown to annotators
  setting TEXT,                    -- JSON: all that is known of how it was made
  UNIQUE (prompt, hash)
);
INSERT INTO "responses" VALUES(1,1,'a16fbedb291b7303d5e0be4a9559f33e9d24221a0a086cad4367a03f8d821da8','one 1','a','{"policy": "a"}');
INSERT INTO "responses" VALUES(2,1,'874f16cd40154e52f0ff8f2c0b01960cb1f643e6ef4e0092342906d0b79f8966','two 1','b',NULL);
INSERT INTO "responses" VALUES(3,2,'ebfb30a69e7b7b1098d5123ac1912eeffca0627e138bd3f24d5fa40baa184663','one 2',NULL,NULL);
INSERT INTO "responses" VALUES(4,2,'0a37c70c6d8819b38aec38e23e1e71d179b4c6d5bb4be7b9a2174f77cb9df41a','two 2',NULL,NULL);
INSERT INTO "responses" VALUES(5,3,'770e607624d689265ca6c44884d0807d9b054d23c473c106c72be9de08b7376c','good',NULL,NULL);
INSERT INTO "responses" VALUES(6,3,'2f05d4b689d270cafb02285f35f44866f7dc8a2d368a3f9d1124373eeab31fb1','bad',NULL,NULL);
CREATE TABLE sessions (
  hash TEXT PRIMARY KEY,
  annotator INTEGER NOT NULL REFERENCES annotators,
  expires REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX pairs_open ON pairs (taken DESC, shuffle) WHERE gold IS NULL;
CREATE INDEX pairs_gold ON pairs (shuffle) WHERE gold IS NOT NULL;
CREATE INDEX presentations_leased ON presentations (expires) WHERE state = 'leased';
CREATE INDEX presentations_own ON presentations (annotator, state, id);
CREATE INDEX presentations_entry ON presentations (annotator, entry);
CREATE INDEX presentations_state ON presentations (state, repeat);
CREATE INDEX judgements_presentation ON judgements (presentation, id);
CREATE TRIGGER judgements_stay BEFORE UPDATE ON judgements
BEGIN SELECT RAISE(ABORT, 'judgements are never changed'); END;
CREATE TRIGGER judgements_remain BEFORE DELETE ON judgements
BEGIN SELECT RAISE(ABORT, 'judgements are never deleted'); END;
CREATE VIEW current AS
SELECT j.* FROM judgements j
WHERE j.id = (SELECT max(l.id) FROM judgements l WHERE l.presentation = j.presentation)
  AND j.verdict <> 'undo';
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('judgements',6);
COMMIT;
