/* Texts -> token ids, by looking up segments that were encoded before. What a segment is, and why that is exact: segments.py.

   Every text comes with the one space before it that the tokenizer puts there. segments_cut looks the segments of some text up; those that
   are new are spelled, one after another with a separator before each, for the tokenizer's engine to encode, and defined with the ids that
   it gives; then segments_emit writes all ids down. A table that is full begins anew. One thread at a time may use a table. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    CHUNK = 4096, /* bytes of text that are looked at together */
    LONGEST = 15, /* bytes of a segment that a slot holds itself */
    IN_SLOT = 3,  /* ids that a slot holds itself */
    IN_RECORD = 0,
    HUGE_PAGE = 1 << 21, /* bytes */
    BEGIN = -1, /* stands among slots for the beginning of a text */
};

typedef struct {
    uint64_t low, high; /* the bytes, and in the highest byte their number; of a longer segment two hashes, and IS_LONG */
} Key;
#define IS_LONG ((uint64_t)255 << 56)

typedef struct {
    Key key; /* high is 0 where the slot is free */
    int32_t ids[IN_SLOT];
    int32_t count; /* of ids; IN_RECORD: ids[0] is the number of a record */
} Slot;

typedef struct {
    uint32_t bytes, size; /* of a long segment: where its bytes begin in the pool, and how many they are */
    uint32_t ids, count;
} Record;

typedef struct {
    uint8_t joins[1 << 16];
    int64_t slot_count, known, fresh_count, record_count, byte_count, id_count, byte_room, id_room;
    Slot *slots;
    Record *records;  /* [slot_count / 4] */
    int32_t *fresh;   /* [room] slots of the segments that have no ids yet, in the order in which they were met */
    uint8_t *bytes;   /* [byte_room] a pool */
    int32_t *ids;     /* [id_room] a pool */
    int32_t separator_id;
    uint8_t separator;
} Table;

void segments_free(Table *table) {
    if (!table) return;
    free(table->slots), free(table->records), free(table->fresh), free(table->bytes), free(table->ids), free(table);
}

static uint64_t word(const uint8_t *bytes) {
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static uint64_t mixed(uint64_t value) {
    value *= 0x9E3779B97F4A7C15u;
    return value ^ value >> 32;
}

/* Reads up to 16 bytes from where the segment begins. */
static Key key_of(const uint8_t *bytes, int64_t size) {
    static const uint64_t first[9] = {0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFF, 0xFFFFFFFFFFFF, 0xFFFFFFFFFFFFFF, ~(uint64_t)0};
    if (size <= LONGEST) {
        uint64_t high = word(bytes + 8) & first[size < 8 ? 0 : size - 8];
        return (Key){word(bytes) & first[size < 8 ? size : 8], high | (uint64_t)size << 56};
    }
    uint64_t hash = size, other = size;
    for (; size >= 8; size -= 8, bytes += 8) hash = mixed(hash ^ word(bytes)), other = (other + word(bytes)) * 0xD6E8FEB86659FD93u;
    return (Key){mixed(hash ^ (word(bytes) & first[size])), other >> 8 | IS_LONG};
}

static int64_t place_of(const Table *table, Key key) { return mixed(key.low ^ mixed(key.high)) & (table->slot_count - 1); }

/* Return the pool with room for so many values of some size, twice as many where it has to grow; NULL, and the old one stays: out of memory. */
static void *with_room(void *pool, int64_t *room, int64_t wanted, int64_t size) {
    if (wanted <= *room) return pool;
    void *grown = realloc(pool, 2 * wanted * size);
    if (grown) *room = 2 * wanted;
    return grown;
}

static Record *new_record(Table *table, Slot *slot) {
    slot->ids[0] = (int32_t)table->record_count;
    return memset(table->records + table->record_count++, 0, sizeof(Record));
}

/* The slot of a segment, made where it is new; -1: out of memory. */
static int64_t slot_of(Table *table, const uint8_t *bytes, int64_t size, Key key, int64_t place) {
    for (; table->slots[place].key.high; place = (place + 1) & (table->slot_count - 1)) {
        const Slot *slot = table->slots + place;
        if (slot->key.low != key.low || slot->key.high != key.high) continue;
        if (size <= LONGEST) return place;
        const Record *record = table->records + slot->ids[0];
        if (record->size == size && !memcmp(table->bytes + record->bytes, bytes, size)) return place;
    }
    Slot slot = {.key = key, .count = IN_RECORD};
    if (size > LONGEST) {
        if (size > INT32_MAX) return -1;
        uint8_t *pool = with_room(table->bytes, &table->byte_room, table->byte_count + size, 1);
        if (!pool) return -1;
        table->bytes = pool;
        Record *record = new_record(table, &slot);
        record->bytes = (uint32_t)table->byte_count, record->size = (uint32_t)size;
        memcpy(table->bytes + table->byte_count, bytes, size);
        table->byte_count += size;
    }
    table->slots[place] = slot;
    table->fresh[table->fresh_count++] = (int32_t)place;
    table->known++;
    return place;
}

static void begin_anew(Table *table) {
    memset(table->slots, 0, table->slot_count * sizeof(Slot));
    table->fresh_count = table->record_count = table->byte_count = table->id_count = 0;
    uint8_t padded[16] = {table->separator};
    Key key = key_of(padded, 1);
    table->slots[place_of(table, key)] = (Slot){.key = key, .ids = {table->separator_id}, .count = 1};
    table->known = 1;
}

/* joins: [256 * 256], not 0 where a text is not to be cut between the two bytes. slots: a power of two, no fewer than 2 ** 16. room: of what
   segments_cut writes. Returns NULL when out of memory. */
Table *segments_new(const uint8_t *joins, int64_t slots, int64_t room, uint8_t separator, int32_t separator_id) {
    Table *table = calloc(1, sizeof *table);
    if (!table) return NULL;
    memcpy(table->joins, joins, sizeof table->joins);
    table->slot_count = slots;
    table->separator = separator, table->separator_id = separator_id;
    table->slots = aligned_alloc(HUGE_PAGE, slots * sizeof(Slot));
    table->records = calloc(slots / 4, sizeof(Record));
    table->fresh = calloc(room, sizeof *table->fresh);
    if (!table->slots || !table->records || !table->fresh) {
        segments_free(table);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    madvise(table->slots, slots * sizeof(Slot), MADV_HUGEPAGE); /* look-ups are all over the table: a fifth faster */
#endif
    begin_anew(table);
    return table;
}

/* Whether another chunk could need more room than there is. Each of the fresh segments may still get a record. */
static int is_full(const Table *table) {
    return table->known + CHUNK > table->slot_count / 4 * 3 || table->record_count + table->fresh_count + CHUNK > table->slot_count / 4 ||
           table->byte_count > 8 * table->slot_count;
}

/* Cut texts into segments and write their slots down, BEGIN before those of each text.
   text: the texts, each with its space, and 16 bytes more. bounds: [texts + 1], where each begins. at: text, and place in it or -1 where it
   is not begun; says afterwards how far this came. room: of slots, above CHUNK. Returns how many were written, -1: out of memory. */
int64_t segments_cut(Table *table, const uint8_t *text, const int64_t *bounds, int64_t texts, int64_t *at, int32_t *slots, int64_t room) {
    int64_t ends[CHUNK], places[CHUNK], made = 0;
    Key keys[CHUNK];
    const uint8_t *joins = table->joins;
    if (table->fresh_count) begin_anew(table); /* the engine failed meanwhile */
    for (; at[0] < texts; at[0]++, at[1] = -1) {
        int64_t stop = bounds[at[0] + 1];
        if (at[1] < 0) {
            if (made == room) return made;
            slots[made++] = BEGIN;
            at[1] = stop - bounds[at[0]] > 1 ? bounds[at[0]] : stop; /* no space is put before an empty text */
        }
        while (at[1] < stop) {
            if (room - made < CHUNK) return made;
            if (is_full(table)) {
                if (made) return made; /* what was written is to be emitted before */
                begin_anew(table);
            }
            const uint8_t *start = text + at[1];
            int64_t size = stop - at[1] > CHUNK ? CHUNK : stop - at[1], count = 0;
            for (int64_t i = 1; i < size; i++) {
                ends[count] = i;
                count += !joins[start[i - 1] << 8 | start[i]];
            }
            if (!count) /* a segment that may be longer than a chunk */
                while (size < stop - at[1] && joins[start[size - 1] << 8 | start[size]]) size++;
            if (!count || size == stop - at[1]) ends[count++] = size;
            for (int64_t i = 0, from = 0; i < count; from = ends[i++]) {
                keys[i] = key_of(start + from, ends[i] - from);
                places[i] = place_of(table, keys[i]);
                __builtin_prefetch(table->slots + places[i]);
            }
            for (int64_t i = 0, from = 0; i < count; from = ends[i++]) {
                int64_t place = slot_of(table, start + from, ends[i] - from, keys[i], places[i]);
                if (place < 0) return -1;
                slots[made++] = (int32_t)place;
            }
            at[1] += ends[count - 1];
        }
    }
    return made;
}

/* The bytes of a segment, from where they are kept. */
static const uint8_t *bytes_of(const Table *table, const Slot *slot, int64_t *size, uint8_t *room) {
    if ((slot->key.high & IS_LONG) == IS_LONG) {
        const Record *record = table->records + slot->ids[0];
        *size = record->size;
        return table->bytes + record->bytes;
    }
    *size = slot->key.high >> 56;
    memcpy(room, &slot->key.low, 8), memcpy(room + 8, &slot->key.high, 8);
    return room;
}

/* Write the new segments to `out`, where it is not NULL, and return how many bytes they take. */
int64_t segments_spell(const Table *table, uint8_t *out) {
    int64_t written = 0, size;
    uint8_t room[16];
    for (int64_t i = 0; i < table->fresh_count; i++) {
        const uint8_t *bytes = bytes_of(table, table->slots + table->fresh[i], &size, room);
        if (out) {
            out[written] = table->separator;
            memcpy(out + written + 1, bytes, size);
        }
        written += 1 + size;
    }
    return written;
}

/* ids: of what segments_spell wrote; those before the first separator are of the space that the tokenizer put there. Returns 1; 0 where they
   are not those of as many segments, each of one token at least and of no more than its bytes; -1: out of memory. */
int64_t segments_define(Table *table, const int32_t *ids, int64_t count) {
    int64_t i = 0, defined = 0, size;
    uint8_t room[16];
    while (i < count && ids[i] != table->separator_id) i++;
    for (; i < count; defined++) {
        int64_t start = ++i;
        while (i < count && ids[i] != table->separator_id) i++;
        if (defined == table->fresh_count) return 0;
        Slot *slot = table->slots + table->fresh[defined];
        bytes_of(table, slot, &size, room);
        if (i == start || i - start > size) return 0;
        if (size <= LONGEST && i - start <= IN_SLOT) {
            memcpy(slot->ids, ids + start, (i - start) * sizeof *ids);
            slot->count = (int32_t)(i - start);
            continue;
        }
        int32_t *pool = with_room(table->ids, &table->id_room, table->id_count + i - start, sizeof *ids);
        if (!pool) return -1;
        table->ids = pool;
        Record *record = size <= LONGEST ? new_record(table, slot) : table->records + slot->ids[0];
        record->ids = (uint32_t)table->id_count, record->count = (uint32_t)(i - start);
        memcpy(table->ids + table->id_count, ids + start, (i - start) * sizeof *ids);
        table->id_count += i - start;
    }
    if (defined != table->fresh_count) return 0;
    table->fresh_count = 0;
    return 1;
}

/* Write the ids of the segments in these slots down, and in `starts` how many came before each BEGIN. out: as much room as bytes were cut, and
   IN_SLOT more. Returns how many ids. */
int64_t segments_emit(const Table *table, const int32_t *slots, int64_t count, int32_t *out, int64_t *starts) {
    int32_t *begin = out;
    for (int64_t i = 0; i < count; i++) {
        if (slots[i] == BEGIN) {
            *starts++ = out - begin;
            continue;
        }
        const Slot *slot = table->slots + slots[i];
        if (slot->count == IN_RECORD) {
            const Record *record = table->records + slot->ids[0];
            memcpy(out, table->ids + record->ids, record->count * sizeof *out);
            out += record->count;
            continue;
        }
        memcpy(out, slot->ids, sizeof slot->ids);
        out += slot->count;
    }
    return out - begin;
}
