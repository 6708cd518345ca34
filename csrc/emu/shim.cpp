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
enum class Waits { for_nothing, for_warp, for_block, for_grid, ended };

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Waits waits = Waits::for_nothing;
  int line = 0;               // of the barrier it stands at
  uint64_t posted = 0;        // what it gives to a shuffle
  uint32_t fragment[6] = {};  // and to a tensor-core product: a, b
};

// The blocks that run at once, on one OS thread: plain globals suffice.
std::vector<Thread> threads;  // block by block
std::vector<std::unique_ptr<void, decltype(&free)>> shared_bytes;  // of each block
int64_t first_block, block_size;
int64_t running;  // index in `threads`

Thread& self() { return threads[running]; }
Thread* my_warp() { return &threads[running - threadIdx.x % WARP_LANES]; }

void wait(Waits reason, int line) {
  self().waits = reason;
  self().line = line;
  self().fiber->pause();
}

// Lets threads [first, last) go on if all of them stand at one barrier of this kind; throws if only some can ever come.
bool release(int64_t first, int64_t last, Waits reason) {
  int64_t standing = -1;
  for (int64_t i = first; i < last; ++i) {
    if (threads[i].waits == reason) standing = i;
  }
  if (standing < 0) return false;
  for (int64_t i = first; i < last; ++i) {
    const Thread& other = threads[i];
    if (other.waits == reason && other.line == threads[standing].line) continue;
    if (other.waits < reason) return false;  // it can still come
    const auto name = [](int64_t of) {
      return "block " + std::to_string(first_block + of / block_size) + ": thread " + std::to_string(of % block_size);
    };
    const std::string where =
        other.waits == Waits::ended ? "has returned" : "waits at line " + std::to_string(other.line);
    throw std::runtime_error("divergent barrier in " + name(standing) + " waits at line " +
                             std::to_string(threads[standing].line) + ", in " + name(i) + " " + where);
  }
  for (int64_t i = first; i < last; ++i) threads[i].waits = Waits::for_nothing;
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

// Runs the threads [start, start + block_size) of one block until all have returned or stand at a barrier of the grid.
void run_block(int64_t start, const Schedule& schedule, std::mt19937_64& random) {
  for (bool progress = true; progress;) {
    for (const int64_t i : order_of(block_size, schedule, random)) {
      running = start + i;
      if (self().waits != Waits::for_nothing) continue;
      threadIdx.x = static_cast<unsigned>(i);
      blockIdx.x = static_cast<unsigned>(first_block + start / block_size);
      self().fiber->resume();
    }
    progress = false;
    for (int64_t warp = 0; warp < block_size; warp += WARP_LANES) {
      progress |= release(start + warp, start + std::min(warp + WARP_LANES, block_size), Waits::for_warp);
    }
    progress |= release(start, start + block_size, Waits::for_block);
  }
}

// Blocks that run at once go one by one as far as they can, so that one without a barrier of the grid is far ahead.
void run_blocks(int64_t first, int64_t count, int block, size_t shared, const Schedule& schedule,
                std::mt19937_64& random, const std::function<void()>& body) {
  first_block = first, block_size = block;
  shared_bytes.clear();
  for (int64_t i = 0; i < count; ++i) {
    shared_bytes.emplace_back(malloc(shared), &free);  // exactly this size: AddressSanitizer sees an overrun
    memset(shared_bytes.back().get(), 0xFF, shared);
  }
  threads = std::vector<Thread>(count * block);
  for (auto& thread : threads) {
    thread.fiber = std::make_unique<Fiber>([&body, &thread] {
      body();
      thread.waits = Waits::ended;
    });
  }
  do {
    for (const int64_t i : order_of(count, schedule, random)) run_block(i * block, schedule, random);
  } while (release(0, count * block, Waits::for_grid));
}

}  // namespace

void sync_all(int line) { wait(Waits::for_grid, line); }
void sync_block(int line) { wait(Waits::for_block, line); }
void sync_warp(int line) { wait(Waits::for_warp, line); }

uint64_t exchange(uint64_t bits, unsigned other_lane, int line) {
  self().posted = bits;
  sync_warp(line);  // all lanes have posted
  const uint64_t other = my_warp()[other_lane].posted;
  sync_warp(line);  // all lanes have read
  return other;
}

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  std::copy(a, a + 4, self().fragment);
  std::copy(b, b + 2, self().fragment + 4);
  sync_warp(line);  // all lanes have posted
  const unsigned lane = threadIdx.x % WARP_LANES;
  // Element k of a row that lane group `g` holds in registers `low` (k < 8) and `high`.
  const auto element = [&](unsigned g, int low, int high, unsigned k) {
    const uint32_t pair = my_warp()[4 * g + k % 8 / 2].fragment[k < 8 ? low : high];
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

void* shared_memory() { return shared_bytes[running / block_size].get(); }

void run(int64_t grid, int block, size_t shared, const Schedule& schedule, bool together,
         const std::function<void()>& body) {
  std::mt19937_64 random(schedule.seed);
  gridDim.x = static_cast<unsigned>(grid);
  if (together) {
    run_blocks(0, grid, block, shared, schedule, random, body);
  } else {
    for (const int64_t index : blocks_of(grid, schedule, random)) {
      run_blocks(index, 1, block, shared, schedule, random, body);
    }
  }
  threads.clear();
  shared_bytes.clear();
}

}  // namespace emu
}  // namespace pymend
