/* A network's step, recorded: its calls one after the other, without a way back in between. */

/* Entries of a ring, one row of floats for each stream; that of a stream's column t is t mod ring.

   streams, ring, floats  of a row
   stream_stride, entry_stride  floats from one stream, or entry, to the next */
typedef struct {
    int64_t streams, ring, floats, stream_stride, entry_stride;
} fc_ring;
/* y (N, floats), where it is not 0, = the oldest entry; x (N, floats) takes its place, where it is
   not 0, and steps (N) go on by one. Nothing of streams whose byte of `active` is 0. */
void fc_run_ring(const fc_ring *p, intptr_t x, intptr_t ring, intptr_t steps, intptr_t y,
                 intptr_t active, int threads);

/* One call: params and addresses are those of the function, weights and bias also the scale and
   shift of a blend, state the ring of a window or a ring. */
enum { FC_CALL_STEP, FC_CALL_BLEND, FC_CALL_MEANS, FC_CALL_POOL, FC_CALL_TURN, FC_CALL_WINDOW,
       FC_CALL_RING };
typedef struct {
    int32_t kind;
    const void *params;
    intptr_t x, weights, bias, residual, state, steps, y, workspace;
} fc_call;

/* All calls in order; states go on in streams whose byte of `active` (N) is not 0, or in all. The
   threads stay awake from the first call to the last. */
void fc_play(const fc_call *calls, int64_t count, intptr_t active, int threads);
