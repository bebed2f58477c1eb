// Sortable tables; nothing else moves.
startTables();
