#include "emu/shim.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/fiber.h"

namespace pymend {
namespace emu {
namespace {

constexpr int WARP_LANES = 32;

// From narrow to wide: a barrier waits for threads that stand at a narrower one.
enum class Waits { for_nothing, for_warp, for_block, ended };

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Waits waits = Waits::for_nothing;
  int line = 0;               // of the barrier it stands at
  uint64_t posted = 0;        // what it gives to a shuffle
  uint32_t fragment[6] = {};  // and to a tensor-core product: a, b
};

// One block at a time, on one OS thread: plain globals suffice.
std::vector<Thread> threads;
std::unique_ptr<void, decltype(&free)> shared_bytes(nullptr, &free);

Thread& self() { return threads[threadIdx.x]; }

void wait(Waits reason, int line) {
  self().waits = reason;
  self().line = line;
  self().fiber->pause();
}

// Lets threads [first, last) go on if all of them stand at one barrier of this kind; throws if only some can ever come.
bool release(int first, int last, Waits reason) {
  int standing = -1;
  for (int i = first; i < last; ++i) {
    if (threads[i].waits == reason) standing = i;
  }
  if (standing < 0) return false;
  for (int i = first; i < last; ++i) {
    const Thread& other = threads[i];
    if (other.waits == reason && other.line == threads[standing].line) continue;
    if (other.waits < reason) return false;  // it can still come
    const std::string where =
        other.waits == Waits::ended ? "has returned" : "waits at line " + std::to_string(other.line);
    throw std::runtime_error("divergent barrier in block " + std::to_string(blockIdx.x) + ": thread " +
                             std::to_string(standing) + " waits at line " + std::to_string(threads[standing].line) +
                             ", thread " + std::to_string(i) + " " + where);
  }
  for (int i = first; i < last; ++i) threads[i].waits = Waits::for_nothing;
  return true;
}

std::vector<int64_t> order_of(int64_t count, const Schedule& schedule, std::mt19937_64& random) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Schedule::reversed) std::reverse(order.begin(), order.end());
  if (schedule.order == Schedule::random) std::shuffle(order.begin(), order.end(), random);
  return order;
}

std::vector<int64_t> blocks_of(int64_t grid, const Schedule& schedule, std::mt19937_64& random) {
  if (schedule.order == Schedule::last && grid > 0) return {grid - 1};
  return order_of(grid, schedule, random);
}

void run_block(int block, const Schedule& schedule, std::mt19937_64& random, const std::function<void()>& body) {
  threads = std::vector<Thread>(block);
  for (auto& thread : threads) {
    thread.fiber = std::make_unique<Fiber>([&body, &thread] {
      body();
      thread.waits = Waits::ended;
    });
  }
  for (bool progress = true; progress;) {
    for (const int64_t i : order_of(block, schedule, random)) {
      if (threads[i].waits != Waits::for_nothing) continue;
      threadIdx.x = static_cast<unsigned>(i);
      threads[i].fiber->resume();
    }
    progress = false;
    for (int first = 0; first < block; first += WARP_LANES) {
      progress |= release(first, std::min(first + WARP_LANES, block), Waits::for_warp);
    }
    progress |= release(0, block, Waits::for_block);
  }
}

}  // namespace

void sync_block(int line) { wait(Waits::for_block, line); }
void sync_warp(int line) { wait(Waits::for_warp, line); }

uint64_t exchange(uint64_t bits, unsigned other_lane, int line) {
  self().posted = bits;
  sync_warp(line);  // all lanes have posted
  const uint64_t other = threads[threadIdx.x / WARP_LANES * WARP_LANES + other_lane].posted;
  sync_warp(line);  // all lanes have read
  return other;
}

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  std::copy(a, a + 4, self().fragment);
  std::copy(b, b + 2, self().fragment + 4);
  sync_warp(line);  // all lanes have posted
  const unsigned warp = threadIdx.x / WARP_LANES * WARP_LANES, lane = threadIdx.x % WARP_LANES;
  // Element k of a row that lane group `g` holds in registers `low` (k < 8) and `high`.
  const auto element = [&](unsigned g, int low, int high, unsigned k) {
    const uint32_t pair = threads[warp + 4 * g + k % 8 / 2].fragment[k < 8 ? low : high];
    const uint32_t word = (k % 2 ? pair >> 16 : pair) << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row_half = i / 2, col = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      c[i] += element(lane / 4, row_half, row_half + 2, k) * element(col, 4, 5, k);
    }
  }
  sync_warp(line);  // all lanes have read
}

void* shared_memory() { return shared_bytes.get(); }

void run(int64_t grid, int block, size_t shared, const Schedule& schedule, const std::function<void()>& body) {
  std::mt19937_64 random(schedule.seed);
  for (const int64_t index : blocks_of(grid, schedule, random)) {
    blockIdx.x = static_cast<unsigned>(index);
    shared_bytes.reset(malloc(shared));  // exactly this size, so that AddressSanitizer sees an overrun
    memset(shared_bytes.get(), 0xFF, shared);
    run_block(block, schedule, random, body);
  }
  threads.clear();
  shared_bytes.reset();
}

}  // namespace emu
}  // namespace pymend
