/* The part of gpusim that runs: threads, warps and CTAs of a compiled kernel on the host.
 *
 * Every GPU thread of a CTA is a fiber with its own stack. A fiber runs until it blocks in a warp-wide
 * operation (shuffle, vote, ...) or at a CTA barrier; then the scheduler picks another one. CTAs run one
 * after the other.
 *
 * Naming: `nvvm_x_y` implements the LLVM intrinsic `llvm.nvvm.x.y`, which lower.py maps by name; other code
 * that lower.py and the PTX translator generate calls `gs_x`.
 *
 * Shared memory is addressed by offsets from SHARED_BASE, as on the device, and is translated at each
 * access. All accesses to global and shared memory pass through gs_global and gs_shared, which check bounds
 * and races, and count.
 */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define API __attribute__((visibility("default")))
#define FULL_WARP 0xffffffffu

enum { MAX_THREADS = 1024, MAX_WARPS = 32, MAX_BARRIERS = 16, MAX_SHARED = 256 << 10 };
enum { STACK_BYTES = 256 << 10, GUARD_BYTES = 4096 };
enum { SHARED_BASE = 4096 };                 /* the same constant as in ir.py */

/* Interface with native.py, where ctypes structures mirror these. */

enum { GLOBAL_LOAD, GLOBAL_STORE, GLOBAL_ATOMIC, SHARED_LOAD, SHARED_STORE, SHARED_ATOMIC, BARRIER };
enum { FLAG_COUNT = 1, FLAG_RACES = 2, FLAG_SHUFFLE = 4, FLAG_FIBERS = 8 };
enum {
    ERR_NONE, ERR_BOUNDS, ERR_SHARED_BOUNDS, ERR_MISALIGNED, ERR_RACE, ERR_DEADLOCK, ERR_TRAP, ERR_MEMORY,
    ERR_OTHER
};

/* One static memory access or barrier, and what passed it; units are sectors or shared-memory wavefronts. */
typedef struct { uint8_t kind, align, dropped; } site_t;
typedef struct { uint64_t requests, lanes, bytes, units; } site_count_t;
typedef struct { uint64_t base, end; } region_t;         /* memory that the kernel may touch */

typedef struct {
    void (*entry)(void *);                   /* runs one thread of the kernel */
    void *args;
    const site_t *sites;
    const region_t *regions;                 /* sorted by base, disjoint */
    site_count_t *site_counts;               /* out */
    uint64_t seed;
    double time_limit;                       /* seconds for one CTA */
    uint32_t grid[3], threads, num_sites, num_regions, shared_bytes, arch, flags;
    uint64_t barriers, shuffles;             /* out: events per CTA and per warp, summed over the launch */
    /* out: the failure that ended it */
    uint32_t error, err_cta[3], err_thread, err_site, err_bytes, err_other;
    uint64_t err_address;
    char err_text[200];
} launch_t;

/* State. The caller holds Python's global lock, so there is one launch at a time. */

/* A hash table with open addressing; slots with another stamp are free. */
typedef struct { uint64_t a, b; uint32_t value, stamp; } slot_t;
typedef struct { slot_t *slots; uint64_t capacity, used; uint32_t stamp; } table_t;
/* One warp-level request: the words it wants of each bank of shared memory. */
typedef struct { uint8_t bank[32], max; } request_t;
/* A thread's cp.async copies that have not arrived. */
typedef struct { char *dst; const char *src; uint32_t bytes, src_bytes, group; } copy_t;
typedef struct { copy_t *items; uint32_t count, capacity, group; } copy_queue_t;
/* A warp's rendezvous. */
typedef struct { uint32_t mask, arrived, phase, members[2]; uint64_t result[2]; } warp_t;

static launch_t *L;                          /* the launch; S is the CTA that runs */
static struct {
    uint32_t cta[3], cta_index, threads, warps, current, live;
    char *shared;
    /* scheduler */
    void *main_sp, *fiber_sp[MAX_THREADS];
    uint32_t ready[MAX_WARPS], done[MAX_WARPS];          /* lane masks */
    uint32_t priority[MAX_WARPS];                        /* for FLAG_SHUFFLE */
    warp_t warp[MAX_WARPS];
    uint64_t lane_value[2][MAX_THREADS];
    uint32_t barrier_waiting[MAX_BARRIERS][MAX_WARPS];   /* lane masks */
    uint32_t barrier_count[MAX_BARRIERS], barrier_need[MAX_BARRIERS];
    uint64_t rng;
    char *stacks;
    uint32_t guarded;                        /* stacks that have their guard page */
    /* checks and counters */
    double deadline;
    uint64_t accesses, spins;
    const region_t *last_region;
    uint32_t *occurrence;                    /* [site][thread]: how often the thread has passed the site */
    table_t table;
    request_t *requests;
    uint32_t num_requests, cap_requests;
    copy_queue_t copies[MAX_THREADS];
    uint32_t epoch;                          /* barriers passed */
    uint32_t *shared_shadow[3], *global_shadow[3];       /* see check_race */
    uint64_t *shadow_start;                  /* where the bytes of a region begin in global_shadow */
} S;

/* Fibers and scheduling. */

void gs_switch(void **save_sp, void *load_sp);
__asm__(".text\n.globl gs_switch\n.hidden gs_switch\n.type gs_switch,@function\ngs_switch:\n"
        " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
        " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
        ".size gs_switch,.-gs_switch\n");

static uint64_t random_u64(uint64_t *state) {            /* splitmix64 */
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Record a failure, which ends the launch, and leave the CTA. */
__attribute__((noreturn)) static void fail(uint32_t error, uint32_t site, uint64_t address, uint32_t bytes,
                                           uint32_t other, const char *text) {
    memcpy(L->err_cta, S.cta, sizeof L->err_cta);
    L->err_thread = S.current;
    L->err_site = site;
    L->err_address = address;
    L->err_bytes = bytes;
    L->err_other = other;
    snprintf(L->err_text, sizeof L->err_text, "%s", text);
    L->error = error;
    void *unused;
    gs_switch(&unused, S.main_sp);
    abort();
}
__attribute__((noreturn)) static void fail_without_site(uint32_t error, const char *text) {
    fail(error, ~0u, 0, 0, 0, text);
}

static void *checked(void *p) { if (!p) fail_without_site(ERR_MEMORY, ""); return p; }

static int lowest(uint32_t mask) { return __builtin_ctz(mask); }
static uint32_t rotate_right(uint32_t x, unsigned n) { n &= 31; return n ? (x >> n) | (x << (32 - n)) : x; }

/* The next fiber to run, or -1 if none can. By default the first ready lane of the current warp, else of the
 * next warp that has one. With FLAG_SHUFFLE a random ready lane of the ready warp with the highest priority;
 * priorities are random and change at CTA barriers and now and then, so that a warp may run far ahead of the
 * others or lag behind. */
static int pick(int after_current) {
    uint32_t warp = S.current / 32;
    if (!(L->flags & FLAG_SHUFFLE)) {
        if (!after_current && S.ready[warp]) return warp * 32 + lowest(S.ready[warp]);
        for (uint32_t i = after_current; i < S.warps + after_current; i++) {
            uint32_t candidate = (warp + i) % S.warps;
            if (S.ready[candidate]) return candidate * 32 + lowest(S.ready[candidate]);
        }
        return -1;
    }
    uint64_t r = random_u64(&S.rng);
    if (r % 512 == 0) S.priority[warp] = r >> 32;
    if (after_current) S.priority[warp] = 0;
    int best = -1;
    for (uint32_t i = 0; i < S.warps; i++)
        if (S.ready[i] && (best < 0 || S.priority[i] > S.priority[best])) best = i;
    if (best < 0) return -1;
    unsigned turn = r >> 16 & 31;
    return best * 32 + ((lowest(rotate_right(S.ready[best], turn)) + turn) & 31);
}

static void shuffle_priorities(void) {
    for (uint32_t i = 0; i < S.warps; i++) S.priority[i] = random_u64(&S.rng) >> 32;
}

static void run_next(int after_current) {
    int next = pick(after_current);
    if (next < 0) {
        char text[160];
        uint32_t at_barrier = 0, in_warp = 0;
        for (uint32_t i = 0; i < S.warps; i++) {
            for (int b = 0; b < MAX_BARRIERS; b++) at_barrier += __builtin_popcount(S.barrier_waiting[b][i]);
            in_warp += __builtin_popcount(S.warp[i].arrived);
        }
        snprintf(text, sizeof text,
                 "of %u threads %u wait at a barrier, %u in a warp operation, %u have exited",
                 S.threads, at_barrier, in_warp, S.threads - S.live);
        fail_without_site(ERR_DEADLOCK, text);
    }
    uint32_t self = S.current;
    S.spins = 0;
    if ((uint32_t)next == self) return;
    S.current = next;
    char *guess = S.fiber_sp[(next + 1) % MAX_THREADS];  /* lanes mostly run in order */
    __builtin_prefetch(guess);
    __builtin_prefetch(guess + 64);
    gs_switch(&S.fiber_sp[self], S.fiber_sp[next]);
}

static void block(void) {
    if (!(L->flags & FLAG_FIBERS))
        fail_without_site(ERR_OTHER, "gpusim bug: a blocking operation without fibers");
    S.ready[S.current / 32] &= ~(1u << (S.current & 31));
    run_next(0);
}

static void release_warp(uint32_t warp) {                /* all lanes of the rendezvous have come */
    warp_t *p = &S.warp[warp];
    S.ready[warp] |= p->arrived;
    p->members[p->phase] = p->arrived;
    p->arrived = 0;
    p->phase ^= 1;
}

static void release_barrier(uint32_t id) {
    for (uint32_t i = 0; i < S.warps; i++) {
        S.ready[i] |= S.barrier_waiting[id][i];
        S.barrier_waiting[id][i] = 0;
    }
    S.barrier_count[id] = 0;
    L->barriers++;
    S.epoch++;
    shuffle_priorities();
}

static uint32_t barrier_expects(uint32_t id) {           /* 0: all threads of the CTA that have not exited */
    return S.barrier_need[id] ? S.barrier_need[id] : S.live;
}

/* Wait for the lanes in `mask`. Returns 1 in the lane that arrives last, which goes on without a switch. */
static int warp_rendezvous(uint32_t mask) {
    uint32_t warp = S.current / 32;
    warp_t *p = &S.warp[warp];
    if (!p->arrived) p->mask = mask;
    if (p->mask != mask) fail_without_site(ERR_OTHER, "lanes of a warp meet with different member masks");
    p->arrived |= 1u << (S.current & 31);
    uint32_t expected = mask & ~S.done[warp];
    if ((p->arrived & expected) == expected) { release_warp(warp); return 1; }
    block();
    return 0;
}

static void cta_barrier(uint32_t id, uint32_t need, uint32_t site) {
    if (L->sites[site].dropped) return;
    if (id >= MAX_BARRIERS) fail_without_site(ERR_OTHER, "barrier number out of range");
    S.barrier_need[id] = need;
    S.barrier_waiting[id][S.current / 32] |= 1u << (S.current & 31);
    S.barrier_count[id]++;
    if (S.barrier_count[id] >= barrier_expects(id)) release_barrier(id);
    else block();
}

static void thread_exit(void) {
    uint32_t warp = S.current / 32, bit = 1u << (S.current & 31);
    S.done[warp] |= bit;
    S.ready[warp] &= ~bit;
    S.live--;
    void *unused;
    if (!S.live) gs_switch(&unused, S.main_sp);
    warp_t *p = &S.warp[warp];                          /* an exit may complete what others wait for */
    if (p->arrived && !(p->mask & ~S.done[warp] & ~p->arrived)) release_warp(warp);
    for (int id = 0; id < MAX_BARRIERS; id++)
        if (S.barrier_count[id] && S.barrier_count[id] >= barrier_expects(id)) release_barrier(id);
    run_next(0);
}

static void fiber_main(void) {
    if (L->flags & FLAG_FIBERS) {
        L->entry(L->args);
        thread_exit();
    }
    /* The kernel has no barrier and no warp operation: run the threads one after the other on one stack. */
    while (S.live--) {
        int next = pick(0);
        S.current = next;
        S.ready[next / 32] &= ~(1u << (next & 31));
        L->entry(L->args);
    }
    void *unused;
    gs_switch(&unused, S.main_sp);
}

/* Counters. */

static uint64_t hash(uint64_t a, uint64_t b) {
    uint64_t h = (a ^ (b * 0x9e3779b97f4a7c15ull)) * 0xff51afd7ed558ccdull;
    return h ^ (h >> 32);
}

static slot_t *find_slot(table_t *t, uint64_t a, uint64_t b) {
    uint64_t i = hash(a, b) & (t->capacity - 1);
    while (t->slots[i].stamp == t->stamp && (t->slots[i].a != a || t->slots[i].b != b))
        i = (i + 1) & (t->capacity - 1);
    return &t->slots[i];
}

static slot_t *insert(table_t *t, uint64_t a, uint64_t b, int *is_new) {
    if (t->used * 2 >= t->capacity) {
        table_t bigger = *t;
        bigger.capacity = t->capacity ? t->capacity * 2 : 1 << 14;
        bigger.slots = checked(calloc(bigger.capacity, sizeof(slot_t)));
        for (uint64_t i = 0; i < t->capacity; i++)
            if (t->slots[i].stamp == t->stamp)
                *find_slot(&bigger, t->slots[i].a, t->slots[i].b) = t->slots[i];
        free(t->slots);
        *t = bigger;
    }
    slot_t *s = find_slot(t, a, b);
    *is_new = s->stamp != t->stamp;
    if (*is_new) { *s = (slot_t){.a = a, .b = b, .stamp = t->stamp}; t->used++; }
    return s;
}

/* The lanes of a warp that pass the same site for the same n-th time form one request. */
static void count_access(uint32_t site, uint64_t address, uint32_t bytes, int active) {
    uint32_t nth = S.occurrence[(size_t)site * S.threads + S.current]++;
    if (!active) return;
    site_count_t *c = &L->site_counts[site];
    int is_new;
    slot_t *s = insert(&S.table, (uint64_t)site << 32 | nth, 1ull << 63 | S.current / 32, &is_new);
    if (is_new) {
        if (S.num_requests == S.cap_requests) {
            S.cap_requests = S.cap_requests ? 2 * S.cap_requests : 4096;
            S.requests = checked(realloc(S.requests, S.cap_requests * sizeof(request_t)));
        }
        s->value = S.num_requests++;
        memset(&S.requests[s->value], 0, sizeof(request_t));
        c->requests++;
    }
    uint32_t request = s->value;
    c->lanes++;
    c->bytes += bytes;
    uint8_t kind = L->sites[site].kind;
    if (kind <= GLOBAL_ATOMIC) {                         /* distinct 32-byte sectors */
        for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; sector++) {
            insert(&S.table, request, sector, &is_new);
            c->units += is_new;
        }
        return;
    }
    request_t *r = &S.requests[request];                /* wavefronts: the most distinct words in any bank */
    for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; word++) {
        is_new = 1;                                      /* atomics to the same word are served one by one */
        if (kind != SHARED_ATOMIC) insert(&S.table, request, word, &is_new);
        if (is_new && ++r->bank[word & 31] > r->max) { r->max = r->bank[word & 31]; c->units++; }
    }
}

/* Memory accesses. */

static const region_t *find_region(uint64_t address, uint32_t bytes) {
    const region_t *r = S.last_region;
    if (r && address >= r->base && address + bytes <= r->end) return r;
    const region_t *regions = L->regions;
    uint32_t low = 0, high = L->num_regions;     /* the last region that begins at or before the address */
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (regions[middle].base <= address) low = middle + 1; else high = middle;
    }
    if (!low || address + bytes > regions[low - 1].end) return NULL;
    return S.last_region = &regions[low - 1];
}

/* Race detection. A shadow of memory holds, for every byte, the parties that last wrote it, last read it and
 * last updated it atomically. A party is a number. The number `many` stands for several parties, and numbers
 * below `floor` date from before a barrier. Two parties race on a byte unless both read it, or both update it
 * atomically. */
enum { WRITTEN, READ, ATOMIC };
typedef struct { uint32_t self, floor, many; int double_writes_race; } parties_t;

static void check_race(uint32_t *const shadow[3], uint64_t first, uint32_t site, uint64_t address,
                       uint32_t bytes, parties_t p) {
    static const uint8_t mine[] = {[GLOBAL_LOAD] = READ, [GLOBAL_STORE] = WRITTEN, [GLOBAL_ATOMIC] = ATOMIC,
                                   [SHARED_LOAD] = READ, [SHARED_STORE] = WRITTEN, [SHARED_ATOMIC] = ATOMIC};
    static const char *const did[] = {"wrote", "read", "updated atomically"};
    int access = mine[L->sites[site].kind];
    for (uint64_t i = first; i < first + bytes; i++) {
        for (int past = WRITTEN; past <= ATOMIC; past++) {
            uint32_t other = shadow[past][i];
            int races = past != access || (access == WRITTEN && p.double_writes_race);
            if (races && other >= p.floor && other != p.self)
                fail(ERR_RACE, site, address, bytes, other == p.many ? ~0u : other, did[past]);
        }
        uint32_t *slot = &shadow[access][i];
        *slot = *slot >= p.floor && *slot != p.self ? p.many : p.self;
    }
}

/* CTAs of a launch are not ordered at all. */
static void check_global_race(const region_t *region, uint32_t site, uint64_t address, uint32_t bytes) {
    uint64_t first = S.shadow_start[region - L->regions] + (address - region->base);
    parties_t ctas = {.self = S.cta_index + 1, .floor = 1, .many = ~0u, .double_writes_race = 1};
    check_race(S.global_shadow, first, site, address, bytes, ctas);
}

/* Warps of a CTA are ordered by barriers only. Several may store to a byte: Triton does so with replicated
 * values. */
static void check_shared_race(uint32_t site, uint64_t offset, uint32_t bytes) {
    uint32_t floor = S.epoch * 64 + 1;
    parties_t warps = {.self = floor + S.current / 32, .floor = floor, .many = floor + 62};
    check_race(S.shared_shadow, offset, site, offset, bytes, warps);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void count_progress(int atomic) {
    if ((++S.accesses & 0xffff) == 0 && now() > S.deadline)
        fail_without_site(ERR_DEADLOCK, "time limit; does the CTA wait for another CTA?");
    /* a thread that waits for another warp must let it move on */
    if (atomic && ++S.spins > 1000 && L->flags & FLAG_FIBERS) run_next(1);
}

static void check_alignment(uint32_t site, uint64_t address, uint32_t bytes) {
    uint32_t align = L->sites[site].align;
    if (address & (align - 1)) fail(ERR_MISALIGNED, site, address, bytes, align, "");
}

/* Check and count a thread's access; inactive threads only take part in the count. Returns the address on
 * the host. */
API void *gs_global(char *p, uint32_t bytes, uint32_t site, uint32_t active) {
    uint64_t address = (uint64_t)p;
    if (L->flags & FLAG_COUNT) count_access(site, address, bytes, active);
    if (!active) return p;
    check_alignment(site, address, bytes);
    const region_t *r = find_region(address, bytes);
    if (!r) fail(ERR_BOUNDS, site, address, bytes, 0, "");
    if (L->flags & FLAG_RACES) check_global_race(r, site, address, bytes);
    count_progress(L->sites[site].kind == GLOBAL_ATOMIC);
    return p;
}

API void *gs_shared(char *p, uint32_t bytes, uint32_t site, uint32_t active) {
    uint32_t offset = (uint32_t)(uint64_t)p - SHARED_BASE;
    if (L->flags & FLAG_COUNT) count_access(site, offset, bytes, active);
    if (!active) return NULL;
    check_alignment(site, offset, bytes);
    if (offset + (uint64_t)bytes > L->shared_bytes)
        fail(ERR_SHARED_BOUNDS, site, offset, bytes, L->shared_bytes, "");
    if (L->flags & FLAG_RACES) check_shared_race(site, offset, bytes);
    count_progress(L->sites[site].kind == SHARED_ATOMIC);
    return S.shared + offset;
}

/* cp.async: the data arrive only when the thread waits for them, so that a missing wait shows. */
API void gs_cp_async(void *dst, const void *src, uint32_t bytes, uint32_t src_bytes, uint32_t active) {
    if (!active) return;
    copy_queue_t *q = &S.copies[S.current];
    if (q->count == q->capacity) {
        q->capacity = q->capacity ? 2 * q->capacity : 16;
        q->items = checked(realloc(q->items, q->capacity * sizeof(copy_t)));
    }
    q->items[q->count++] = (copy_t){dst, src, bytes, src_bytes < bytes ? src_bytes : bytes, q->group};
}

static void finish_copies(uint32_t pending_groups) {
    copy_queue_t *q = &S.copies[S.current];
    uint32_t kept = 0;
    for (uint32_t i = 0; i < q->count; i++) {
        copy_t *c = &q->items[i];
        if (c->group + pending_groups >= q->group) { q->items[kept++] = *c; continue; }
        memcpy(c->dst, c->src, c->src_bytes);
        memset(c->dst + c->src_bytes, 0, c->bytes - c->src_bytes);
    }
    q->count = kept;
}

API void nvvm_cp_async_commit_group(void) { S.copies[S.current].group++; }
API void nvvm_cp_async_wait_group(uint32_t n) { finish_copies(n); }
API void nvvm_cp_async_wait_all(void) { nvvm_cp_async_commit_group(); finish_copies(0); }

/* Special registers, barriers, warp operations. */

#define REGISTER(name, value) API uint32_t nvvm_read_ptx_sreg_##name(void) { return (value); }
REGISTER(tid_x, S.current) REGISTER(tid_y, 0) REGISTER(tid_z, 0)
REGISTER(ntid_x, S.threads) REGISTER(ntid_y, 1) REGISTER(ntid_z, 1)
REGISTER(ctaid_x, S.cta[0]) REGISTER(ctaid_y, S.cta[1]) REGISTER(ctaid_z, S.cta[2])
REGISTER(nctaid_x, L->grid[0]) REGISTER(nctaid_y, L->grid[1]) REGISTER(nctaid_z, L->grid[2])
REGISTER(laneid, S.current & 31) REGISTER(warpid, S.current / 32) REGISTER(nwarpid, S.warps)
REGISTER(warpsize, 32)
REGISTER(lanemask_eq, 1u << (S.current & 31)) REGISTER(lanemask_lt, (1u << (S.current & 31)) - 1)
REGISTER(lanemask_le, (2u << (S.current & 31)) - 1) REGISTER(lanemask_gt, ~((2u << (S.current & 31)) - 1))
REGISTER(lanemask_ge, ~((1u << (S.current & 31)) - 1))

API void nvvm_barrier_cta_sync_aligned_all(uint32_t id, uint32_t site) { cta_barrier(id, 0, site); }
API void nvvm_barrier_cta_sync_all(uint32_t id, uint32_t site) { cta_barrier(id, 0, site); }
API void nvvm_barrier_cta_sync_count(uint32_t id, uint32_t n, uint32_t site) { cta_barrier(id, n, site); }
API void nvvm_barrier_cta_sync_aligned_count(uint32_t id, uint32_t n, uint32_t site) {
    cta_barrier(id, n, site);
}

API void nvvm_bar_warp_sync(uint32_t mask, uint32_t site) {
    if (!L->sites[site].dropped) warp_rendezvous(mask);
}

/* What the lanes of a warp publish to each other in one warp operation; valid until the lane's next one. */
typedef struct {
    uint64_t *values;        /* [lane] */
    uint64_t *result;        /* a common result; the lane that has `last` set runs first and computes it */
    uint32_t members;        /* lanes that take part */
    int last;
} exchange_t;

static exchange_t exchange(uint32_t mask, uint64_t value) {
    warp_t *p = &S.warp[S.current / 32];
    uint32_t phase = p->phase;
    S.lane_value[phase][S.current] = value;
    int last = warp_rendezvous(mask);
    L->shuffles += last;
    return (exchange_t){&S.lane_value[phase][S.current & ~31u], &p->result[phase], p->members[phase], last};
}

/* PTX ISA, shfl.sync: c packs the clamp value (bits 0-4) and the segment mask (bits 8-12). A lane whose
 * source is out of range keeps its value, and *ok is 0. */
enum { UP, DOWN, BUTTERFLY, INDEX };
static uint32_t shfl(int mode, uint32_t mask, uint32_t value, uint32_t b, uint32_t c, uint32_t *ok) {
    int lane = S.current & 31, offset = b & 31, segment = (c >> 8) & 31, clamp = c & 31;
    int low = lane & segment, high = low | (clamp & ~segment);
    int source[] = {[UP] = lane - offset, [DOWN] = lane + offset, [BUTTERFLY] = lane ^ offset,
                    [INDEX] = low | (offset & ~segment)};
    *ok = mode == UP ? source[mode] >= high : source[mode] <= high;
    exchange_t x = exchange(mask, value);
    return (uint32_t)x.values[*ok ? source[mode] : lane];
}
static float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
typedef struct { uint64_t first, second; } pair_t;       /* in rax and rdx, as LLVM returns { i32, i1 } */
#define SHFL(name, mode) \
    API pair_t nvvm_shfl_sync_##name##_i32p(uint32_t mask, uint32_t value, uint32_t b, uint32_t c) { \
        uint32_t ok, r = shfl(mode, mask, value, b, c, &ok); \
        return (pair_t){r, ok}; \
    } \
    API uint32_t nvvm_shfl_sync_##name##_i32(uint32_t mask, uint32_t value, uint32_t b, uint32_t c) { \
        return (uint32_t)nvvm_shfl_sync_##name##_i32p(mask, value, b, c).first; \
    } \
    API float nvvm_shfl_sync_##name##_f32(uint32_t mask, float value, uint32_t b, uint32_t c) { \
        return as_float(nvvm_shfl_sync_##name##_i32(mask, as_bits(value), b, c)); \
    }
SHFL(up, UP) SHFL(down, DOWN) SHFL(bfly, BUTTERFLY) SHFL(idx, INDEX)

#define FOR_LANES(members) \
    for (uint32_t rest = (members), i; rest && ((i = lowest(rest)), 1); rest &= rest - 1)
#define REDUX(name, type, start, combine) \
    API uint32_t nvvm_redux_sync_##name(uint32_t value, uint32_t mask) { \
        exchange_t e = exchange(mask, value); \
        if (e.last) { \
            type a = start; \
            FOR_LANES(e.members) { type x = (type)e.values[i]; a = (combine); } \
            *e.result = (uint32_t)a; \
        } \
        return (uint32_t)*e.result; \
    }
REDUX(add, uint32_t, 0, a + x) REDUX(and, uint32_t, ~0u, a & x)
REDUX(or, uint32_t, 0, a | x) REDUX(xor, uint32_t, 0, a ^ x)
REDUX(umin, uint32_t, ~0u, x < a ? x : a) REDUX(umax, uint32_t, 0, x > a ? x : a)
REDUX(min, int32_t, INT32_MAX, x < a ? x : a) REDUX(max, int32_t, INT32_MIN, x > a ? x : a)
#define REDUX_F(name, propagate_nan, keep) \
    API float nvvm_redux_sync_##name(float value, uint32_t mask) { \
        exchange_t e = exchange(mask, as_bits(value)); \
        if (e.last) { \
            float a = NAN; \
            int nan = 0; \
            FOR_LANES(e.members) { \
                float x = as_float((uint32_t)e.values[i]); \
                nan |= isnan(x); \
                if (isnan(a) || (!isnan(x) && !(keep))) a = x; \
            } \
            *e.result = as_bits(propagate_nan && nan ? NAN : a); \
        } \
        return as_float((uint32_t)*e.result); \
    }
REDUX_F(fmin, 0, a <= x) REDUX_F(fmin_NaN, 1, a <= x) REDUX_F(fmax, 0, a >= x) REDUX_F(fmax_NaN, 1, a >= x)

/* Of an i1 argument only the lowest bit is defined. */
static uint32_t ballot(uint32_t mask, uint32_t predicate, uint32_t *members) {
    exchange_t e = exchange(mask, predicate & 1);
    if (e.last) { uint64_t votes = 0; FOR_LANES(e.members) votes |= e.values[i] << i; *e.result = votes; }
    *members = e.members;
    return (uint32_t)*e.result;
}
#define VOTE(name, value) \
    API uint32_t nvvm_vote_##name##_sync(uint32_t mask, uint32_t predicate) { \
        uint32_t members, votes = ballot(mask, predicate, &members); \
        (void)members; \
        return (value); \
    }
VOTE(ballot, votes) VOTE(all, votes == members) VOTE(any, votes != 0)

static uint32_t match_any(uint32_t mask, uint64_t value) {
    exchange_t e = exchange(mask, value);
    uint32_t r = 0;
    FOR_LANES(e.members) r |= (uint32_t)(e.values[i] == value) << i;
    return r;
}
API uint32_t nvvm_match_any_sync_i32(uint32_t mask, uint32_t v) { return match_any(mask, v); }
API uint32_t nvvm_match_any_sync_i64(uint32_t mask, uint64_t v) { return match_any(mask, v); }
API uint32_t nvvm_activemask(void) { return FULL_WARP & ~S.done[S.current / 32]; }

/* Lane 8 i + r gives the address of row r of 8 x 8 matrix i; lane l holds row l / 4, elements 2 (l % 4) and
 * the next (or, transposed, column l / 4). */
API void gs_ldmatrix(uint32_t *out, char *row, uint32_t count, uint32_t transposed, uint32_t site) {
    uint32_t lane = S.current & 31;
    uint64_t *rows = exchange(FULL_WARP, (uint64_t)gs_shared(row, 16, site, lane < 8 * count)).values;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t pair[2];
        for (int j = 0; j < 2; j++) {
            uint32_t r = lane / 4, c = 2 * (lane % 4) + j;
            memcpy(&pair[j], (char *)rows[8 * i + (transposed ? c : r)] + 2 * (transposed ? r : c), 2);
        }
        memcpy(&out[i], pair, 4);
    }
    warp_rendezvous(FULL_WARP);                        /* all lanes have read before any goes on */
}
API void gs_stmatrix(const uint32_t *in, char *row, uint32_t count, uint32_t transposed, uint32_t site) {
    uint32_t lane = S.current & 31;
    uint64_t *rows = exchange(FULL_WARP, (uint64_t)gs_shared(row, 16, site, lane < 8 * count)).values;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t pair[2];
        memcpy(pair, &in[i], 4);
        for (int j = 0; j < 2; j++) {
            uint32_t r = lane / 4, c = 2 * (lane % 4) + j;
            memcpy((char *)rows[8 * i + (transposed ? c : r)] + 2 * (transposed ? r : c), &pair[j], 2);
        }
    }
    warp_rendezvous(FULL_WARP);
}

/* Traps. */

API void gs_trap(void) { fail_without_site(ERR_TRAP, "trap instruction"); }
API void __assertfail(const char *message, const char *file, uint32_t line, const char *function,
                      uint64_t char_size) {
    char text[200];
    (void)function; (void)char_size;
    snprintf(text, sizeof text, "device assertion \"%s\" failed at %s:%u", message, file, line);
    fail_without_site(ERR_TRAP, text);
}

/* Arithmetic. The .approx and .ftz forms are computed to full precision, without flushing denormals. */

#define UNARY(suffix, expression) API float nvvm_##suffix(float x) { return (expression); }
#define UNARY_APPROX(name, expression) \
    UNARY(name##_approx_f, expression) UNARY(name##_approx_ftz_f, expression) \
    UNARY(name##_approx_f32, expression) UNARY(name##_approx_ftz_f32, expression)
UNARY_APPROX(ex2, exp2f(x))
UNARY_APPROX(lg2, log2f(x))
UNARY_APPROX(rcp, 1 / x)
UNARY_APPROX(rsqrt, 1 / sqrtf(x))
UNARY_APPROX(sqrt, sqrtf(x))
UNARY_APPROX(sin, sinf(x))
UNARY_APPROX(cos, cosf(x))
UNARY_APPROX(tanh, tanhf(x))
UNARY(sqrt_rn_f, sqrtf(x)) UNARY(sqrt_rn_ftz_f, sqrtf(x)) UNARY(sqrt_f, sqrtf(x))
UNARY(rcp_rn_f, 1 / x) UNARY(rcp_rn_ftz_f, 1 / x)
UNARY(fabs_f32, fabsf(x)) UNARY(fabs_ftz_f32, fabsf(x)) UNARY(fabs_ftz, fabsf(x))
UNARY(floor_f, floorf(x)) UNARY(floor_ftz_f, floorf(x)) UNARY(ceil_f, ceilf(x)) UNARY(ceil_ftz_f, ceilf(x))
UNARY(trunc_f, truncf(x)) UNARY(trunc_ftz_f, truncf(x)) UNARY(round_f, rintf(x)) UNARY(round_ftz_f, rintf(x))
UNARY(saturate_f, fminf(fmaxf(x, 0), 1)) UNARY(saturate_ftz_f, fminf(fmaxf(x, 0), 1))
API float nvvm_fabs(float x) { return fabsf(x); }
API double nvvm_sqrt_rn_d(double x) { return sqrt(x); }
API double nvvm_rcp_rn_d(double x) { return 1 / x; }

#define BINARY(suffix, expression) API float nvvm_##suffix(float a, float b) { return (expression); }
BINARY(div_full, a / b)
BINARY(div_full_ftz, a / b)
BINARY(div_approx_f, a / b)
BINARY(div_approx_ftz_f, a / b)
BINARY(div_rn_f, a / b) BINARY(div_rn_ftz_f, a / b) BINARY(mul_rn_f, a * b) BINARY(mul_rn_ftz_f, a * b)
BINARY(add_rn_f, a + b) BINARY(add_rn_ftz_f, a + b)
BINARY(fmin_f, fminf(a, b))
BINARY(fmin_ftz_f, fminf(a, b))
BINARY(fmax_f, fmaxf(a, b))
BINARY(fmax_ftz_f, fmaxf(a, b))
BINARY(fmin_nan_f, isnan(a) || isnan(b) ? NAN : fminf(a, b))
BINARY(fmax_nan_f, isnan(a) || isnan(b) ? NAN : fmaxf(a, b))
API double nvvm_add_rn_d(double a, double b) { return a + b; }
API double nvvm_mul_rn_d(double a, double b) { return a * b; }
API double nvvm_div_rn_d(double a, double b) { return a / b; }
API float nvvm_fma_rn_f(float a, float b, float c) { return fmaf(a, b, c); }
API float nvvm_fma_rn_ftz_f(float a, float b, float c) { return fmaf(a, b, c); }
API double nvvm_fma_rn_d(double a, double b, double c) { return fma(a, b, c); }

API uint32_t nvvm_mulhi_ui(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
API int32_t nvvm_mulhi_i(int32_t a, int32_t b) { return (int32_t)((int64_t)a * b >> 32); }
API uint64_t nvvm_mulhi_ull(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
API int64_t nvvm_mulhi_ll(int64_t a, int64_t b) { return (int64_t)((__int128)a * b >> 64); }

/* Conversions to integers saturate and send NaN to zero, as PTX cvt does. */
static int64_t to_integer(double x, int64_t low, int64_t high) {
    return isnan(x) ? 0 : x <= (double)low ? low : x >= (double)high ? high : (int64_t)x;
}
#define TO_INT(name, rounded) \
    API int32_t nvvm_f2i_##name(float x) { return (int32_t)to_integer(rounded, INT32_MIN, INT32_MAX); } \
    API int32_t nvvm_f2i_##name##_ftz(float x) { return nvvm_f2i_##name(x); } \
    API uint32_t nvvm_f2ui_##name(float x) { return (uint32_t)to_integer(rounded, 0, UINT32_MAX); } \
    API int32_t nvvm_d2i_##name(double x) { return (int32_t)to_integer(rounded, INT32_MIN, INT32_MAX); }
TO_INT(rn, rint(x)) TO_INT(rz, trunc(x)) TO_INT(rm, floor(x)) TO_INT(rp, ceil(x))
API float nvvm_i2f_rn(int32_t x) { return (float)x; }
API float nvvm_ui2f_rn(uint32_t x) { return (float)x; }

API uint32_t nvvm_prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t pick_byte = selector >> (4 * i), byte = (uint32_t)(bytes >> (8 * (pick_byte & 7))) & 0xff;
        if (pick_byte & 8) byte = byte & 0x80 ? 0xff : 0;
        r |= byte << (8 * i);
    }
    return r;
}
API int __nvvm_reflect(const char *name) {
    return !strcmp(name, "__CUDA_FTZ") ? 1 : !strcmp(name, "__CUDA_ARCH") ? (int)L->arch * 10 : 0;
}

/* LLVM calls these for bfloat on hosts without AVX512-BF16; libgcc before version 13 lacks them. A bfloat
 * travels in the low 16 bits of xmm0. */
API __m128i __truncsfbf2(float f) {
    uint32_t u = as_bits(f);
    uint32_t r = (u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return _mm_cvtsi32_si128(r & 0xffff);
}
API __m128i __truncdfbf2(double d) { return __truncsfbf2((float)d); }

/* Launching. */

static void run_cta(uint64_t index) {
    S.cta_index = (uint32_t)index;
    S.cta[0] = index % L->grid[0];
    S.cta[1] = index / L->grid[0] % L->grid[1];
    S.cta[2] = (uint32_t)(index / L->grid[0] / L->grid[1]);
    S.live = S.threads;
    S.accesses = S.spins = 0;
    S.deadline = now() + L->time_limit;
    S.rng = L->seed ^ (index + 1) * 0xd1342543de82ef95ull;
    memset(S.shared, 0xff, L->shared_bytes);             /* poison: NaN, -1 */
    memset(S.done, 0, sizeof S.done);
    memset(S.warp, 0, sizeof S.warp);
    memset(S.barrier_waiting, 0, sizeof S.barrier_waiting);
    memset(S.barrier_count, 0, sizeof S.barrier_count);
    for (uint32_t i = 0; i < S.warps; i++) S.ready[i] = FULL_WARP;
    for (uint32_t i = 0; i < S.threads; i++) S.copies[i].count = S.copies[i].group = 0;
    S.epoch++;
    if (L->flags & FLAG_COUNT) {
        memset(S.occurrence, 0, (size_t)L->num_sites * S.threads * sizeof *S.occurrence);
        S.table.stamp++;
        S.table.used = 0;
        S.num_requests = 0;
    }
    uint32_t fibers = L->flags & FLAG_FIBERS ? S.threads : 1;
    for (; S.guarded < fibers; S.guarded++)
        mprotect(S.stacks + (size_t)S.guarded * STACK_BYTES, GUARD_BYTES, PROT_NONE);
    for (uint32_t i = 0; i < fibers; i++) {
        /* Stagger the stacks: equal offsets in all of them would compete for the same cache sets. */
        uint64_t *sp = (uint64_t *)(S.stacks + (size_t)(i + 1) * STACK_BYTES - 64 - (i % 32) * 832);
        *--sp = 0;                                       /* keeps sp + 8 a multiple of 16 at entry */
        *--sp = (uint64_t)fiber_main;
        for (int k = 0; k < 6; k++) *--sp = 0;
        S.fiber_sp[i] = sp;
    }
    shuffle_priorities();
    S.current = 0;
    int first = pick(0);
    S.current = L->flags & FLAG_FIBERS ? first : 0;
    gs_switch(&S.main_sp, S.fiber_sp[S.current]);
}

/* A random order of the CTAs. */
static int shuffle_ctas(uint64_t **order, uint64_t num_ctas) {
    uint64_t state = L->seed;
    *order = malloc(num_ctas * sizeof **order);
    if (!*order) return 0;
    for (uint64_t i = 0; i < num_ctas; i++) {            /* Fisher-Yates */
        uint64_t j = random_u64(&state) % (i + 1);
        (*order)[i] = (*order)[j];
        (*order)[j] = i;
    }
    return 1;
}

static int allocate_shadows(void) {
    uint64_t total = 0;
    S.shadow_start = calloc(L->num_regions + 1, sizeof *S.shadow_start);
    if (!S.shadow_start) return 0;
    for (uint32_t i = 0; i < L->num_regions; i++) {
        S.shadow_start[i] = total;
        total += L->regions[i].end - L->regions[i].base;
    }
    for (int i = 0; i < 3; i++) {
        S.global_shadow[i] = calloc(total + 1, sizeof *S.global_shadow[i]);
        S.shared_shadow[i] = calloc(MAX_SHARED, sizeof *S.shared_shadow[i]);
        if (!S.global_shadow[i] || !S.shared_shadow[i]) return 0;
    }
    return 1;
}

/* What a launch needs; stacks and shared memory are kept from launch to launch, as mapping them is slow. */
static int prepare(void) {
    S.threads = L->threads;
    S.warps = L->threads / 32;
    S.last_region = NULL;
    S.epoch = 0;
    if (!S.stacks) {
        void *stacks = mmap(NULL, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (stacks == MAP_FAILED) return 0;
        S.stacks = stacks;
    }
    if (!S.shared && !(S.shared = aligned_alloc(1024, MAX_SHARED))) return 0;
    if (L->flags & FLAG_COUNT) {
        S.occurrence = malloc(((size_t)L->num_sites * L->threads + 1) * sizeof *S.occurrence);
        if (!S.occurrence) return 0;
    }
    return !(L->flags & FLAG_RACES) || allocate_shadows();
}

/* Run all CTAs of a launch; returns its error code. */
API uint32_t gs_launch(launch_t *launch) {
    L = launch;
    uint64_t num_ctas = (uint64_t)L->grid[0] * L->grid[1] * L->grid[2], *order = NULL;
    if (!prepare() || (L->flags & FLAG_SHUFFLE && !shuffle_ctas(&order, num_ctas))) L->error = ERR_MEMORY;
    for (uint64_t i = 0; i < num_ctas && !L->error; i++) run_cta(order ? order[i] : i);
    free(order);
    free(S.occurrence);
    free(S.shadow_start);
    S.occurrence = NULL;
    S.shadow_start = NULL;
    for (int i = 0; i < 3; i++) {
        free(S.global_shadow[i]);
        free(S.shared_shadow[i]);
        S.global_shadow[i] = S.shared_shadow[i] = NULL;
    }
    return L->error;
}
